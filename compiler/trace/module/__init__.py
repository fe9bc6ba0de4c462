"""What tracing does to the user's module and its functions while it runs, and undoes."""
