"""The small verbs of the command line: functions that join a settings dataclass to the rooms."""
