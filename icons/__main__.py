"""`python -m icons`, which torchrun needs: `torchrun --nproc-per-node 8 -m icons gradients ...`."""

from icons.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
