"""Command line, demo and viewers; nothing else imports them."""
