"""Parts of the step-time benchmark (tools/bench/step.py), in reading order.

cases      which cases there are, and what each is given
rounds     the order in which they take their turns
process    a worker as the parent sees it
worker     the same as seen from inside: steps on command, and what is told of them
training   what all cases share: architecture, first values, batches
paged      AngelPTM
resident   plain PyTorch with everything in DRAM
infinity   DeepSpeed ZeRO-3 with parameters and states on NVMe (deepspeed.md says how to install it)
ceilings   matmul and memory rates, as a worker of its own
drive      fio on the same drive with the same mix of reads and writes
result     medians, limits, ratios; what is printed

``training``, ``worker`` and ``infinity`` also run in an interpreter that has DeepSpeed and no AngelPTM.
"""
