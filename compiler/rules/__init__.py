"""What operators mean, in factors. Importing `shardc.compiler.rules.ops.all_rules` fills the table."""
