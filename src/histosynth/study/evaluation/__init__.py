"""One page about synthetic tiles: are they real enough, varied enough, copies, of the right class?"""
