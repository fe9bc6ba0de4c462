"""Any nn.Module to one joint graph: the only room that knows torch inside."""
