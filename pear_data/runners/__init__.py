"""Where engines run: in child processes or on a Ray cluster, several at once, restarted when they die."""
