"""What people look at: pictures and timelines of plans, and the command that plans a run.

draw, chart    ``rf.draw``: the mask matrix with its owners, and who computes, sends and waits when
trace          the same timeline for Perfetto
reading        masks and lengths as people type them
planner        the question of ``python -m ringflash plan``, and what was found       report    its words
"""
