"""The changes that adaptive discriminator augmentation (2006.06676) draws from, a small function each.

`histosynth.gan.augment.augment` runs them. Every function takes the strengths (`Pipe`) and the random numbers of the
batch (`Draws`) and changes a sample by that sample's row of numbers alone.
"""
