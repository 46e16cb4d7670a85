"""What trains and prunes: run.py lives as long as a run, training.py as long as a state; choose.py says what goes.

model.py builds what a run trains, optimizer.py what trains it, capture.py turns steps into CUDA graphs, evaluation.py
measures, and sensitivity.py what layers can spare; checkpoint.py, folder.py and tracking.py keep what is to last,
journal.py finds the words and rows for it; processes.py is what several processes of torchrun do together.
What strengthens training: mixing.py mixes images, depth.py drops branches, averaging.py averages weights, distill.py
asks a teacher, objective.py is the loss of it all; finish.py says what comes behind the last state.
"""
