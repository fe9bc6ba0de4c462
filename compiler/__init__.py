"""The compiler: types, rules, and the walk from a traced module to a sharded program."""
