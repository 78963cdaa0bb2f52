"""Block-sparse models over several GPUs, each of which holds a part of every layer (tensor parallelism).

`partition` says which units go where, `plan` finds the units of a model, `split` takes their part out of a layer and
puts layers together again, `collectives` joins what the parts compute, and `model` does it all to a model.
"""
