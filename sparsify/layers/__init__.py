"""Block-sparse modules, each a drop-in for one kind of dense layer."""
