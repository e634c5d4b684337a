"""Training on several ranks (processes, a GPU each): torch's FSDP2, DTensor and device meshes, started by torchrun.

    mesh.py     the device mesh, this process's position in it, and what all ranks agree on
    shard.py    weights, gradients and optimizer state split over ranks (FSDP2)
    tensor.py   heads and hidden units of each layer split over ranks (DTensor plans)
    context.py  each sequence split over ranks: pasts that exchange states and keys with other ranks

The three compose. Ranks are numbered data, context, tensor, the last fastest; FSDP2 shards over data and context
together.
"""
