"""The language of operator rules, in factors. Importing `shardc.compiler.rules.ops.all_rules` fills the table."""
