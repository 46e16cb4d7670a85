"""Pruning of any model whose units are described as data; nothing here knows what architecture it works on.

units.py       what a unit is: its share of each tensor, what follows it, how many weights it has
masks.py       masks as values, their element-wise step and refill; models under `torch.nn.utils.prune`
threshold.py   the one global threshold of the element-wise step
nm.py          N of every M consecutive weights, instead of that threshold
scores.py      how important each unit is: the criteria and the one scorer
ranking.py     which units are kept: quotas, schedules, the one ranking rule
depth.py       the same for whole attentions, MLPs and blocks
budget.py      how many units each layer keeps under a limit of parameters, MACs or milliseconds
curves.py      the same with the least loss, by the sensitivity of each layer
rounding.py    numbers of units as multiples that fit the hardware
moments.py     what layers read: means and covariances over calibration images
repair.py      least squares at the cut: the weights that are kept take over what was removed
ranks.py       heads with fewer dimensions, by rotation
width.py       a residual stream of fewer channels, by rotation
removal.py     units physically removed from tensors and models
reports.py     what a step did, as text
"""
