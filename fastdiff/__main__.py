"""python -m fastdiff, which torchrun can start: torchrun --nproc_per_node 2 -m fastdiff sample ..."""

from fastdiff.cli import main

main()
