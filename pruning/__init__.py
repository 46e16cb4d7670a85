"""Pruning of any model whose units are described as data; nothing here knows what architecture it works on.

    units.py       what a unit is: its parts in each tensor, what follows it, what one of it weighs
    masks.py       masks as values, their element-wise step and refill; models under `torch.nn.utils.prune`
    threshold.py   the one global threshold of the element-wise step
    nm.py          N of every M consecutive weights, in its place
    scores.py      how much each unit matters: the criteria and the one scorer
    ranking.py     which units stay: quotas, schedules, the one ranking rule
    curves.py      what layers lose by what goes of them: how many units cost the least loss
    moments.py     what layers read: means and covariances over calibration images
    repair.py      least squares at the cut: what stays takes over what went
    ranks.py       heads with fewer dimensions, in bases where those that go carry next to nothing
    width.py       a residual stream of fewer channels, by rotation
    removal.py     units cut out of tensors and models, and put back
    reports.py     what a step did, as text

Units come in from `families`; masks, kept ids and smaller models go out.
"""
