"""What a run will take, before it runs: seconds, bytes and memory of a set of plans on a described machine.

    workload   what one attention call computes and sends for each token
    hardware   rates and links of a machine (hardware.toml)
    timeline   the steps of all ranks, played with seconds instead of tensors
    model      one pass of a set of plans: the three above together
    holding    what a rank holds meanwhile            traffic   the bytes alone, beside a plain ring's
    advice     what else could be tried               cost      ``rf.estimate``, which asks them all
    memory     a whole transformer: the longest context on so many GPUs

Nothing here needs torch, a device or a network.
"""
