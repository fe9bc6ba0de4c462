"""Plans found by search: what of a model may be split, candidates as plans, and what each costs."""
