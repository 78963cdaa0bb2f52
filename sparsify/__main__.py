"""`python -m sparsify`: the command line without an installed script."""

from sparsify.cli.main import main

main()
