"""What operators mean, in factors. Importing `shardc.compiler.rules.all_rules` fills the table."""
