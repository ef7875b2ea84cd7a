"""Do synthetic tiles help a classifier? The experiment that decides: the verb `utility`."""
