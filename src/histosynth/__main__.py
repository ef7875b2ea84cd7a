"""`python -m histosynth` is the command `histosynth`."""

from histosynth.cli import main

main()
