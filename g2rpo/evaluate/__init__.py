"""`g2rpo evaluate`: a checkpoint, or a folder of images, past all rewards.

    command.py                 the command: what is asked for, and in which order it is done
    settings.py                its configuration
    of_run.py policies.py      a run: images of its base policy and of a checkpoint
    of_images.py folder.py     images that something else has drawn, and their prompts
    scores.py                  rewards on them
    statistics.py result.py    means, intervals, win rates: what an evaluation is
    files.py table.py page.py thumbnails.py    what is made of it
"""
