"""Networks that NVIDIA's StyleGAN2-ADA and StyleGAN3 training wrote: read without running their code, and written back.

open.py      what a file is, by its first bytes        opcodes.py   a pickle's opcodes, one by one
read.py      what its names mean: plain values         storage.py   the tensor data inside
plain.py     files of tensors alone                    network.py   the networks among the values
settings.py  what they were called with, as our Shape  check.py     whether each layer computes what ours does
names.py     NVIDIA's names of tensors and ours        convert.py, export.py   there and back
"""
