"""What trains and prunes: run.py lives as long as a run, training.py as long as a state; choose.py selects the units.

model.py builds what a run trains, rounds.py says how long and on which images, network.py prepares it for a state and
optimizer.py updates it; capture.py turns steps into CUDA graphs, evaluation.py measures accuracy, sensitivity.py what
layers can spare. recorder.py, checkpoint.py, run_folder.py and tracking.py write files, journal.py their rows and the
lines of the log; resume.py puts a checkpoint back into a run; processes.py is what processes of torchrun do together.
Training recipes: mixing.py mixes images, drop_path.py drops branches, averaging.py averages weights, distill.py adds a
teacher, objective.py is the loss of it all.
"""
