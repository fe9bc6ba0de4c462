"""From global shapes to what each rank runs, and when."""
