"""What the user wishes, met with the model: styles, patterns, units, and the report."""
