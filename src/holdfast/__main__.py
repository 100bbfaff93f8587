"""`python -m holdfast` is the `holdfast` command. Must never do anything else."""

from holdfast.cli.main import main

if __name__ == "__main__":
    main()
