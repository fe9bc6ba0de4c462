"""A program, or a rule, proved against one device."""
