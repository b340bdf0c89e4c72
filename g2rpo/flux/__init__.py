"""FLUX: from a pipeline on the hub or in a folder to images of a trained checkpoint.

What training needs, each built on those above it:

    files       where a pipeline's files are, and whether they are whole
    loading     weights from their files to the device, without a second copy in memory
    images      latent tokens, their positions, and their way to images
    text        CLIP and T5: from prompts to embeddings
    store       embeddings in a folder: what it holds, and reading it
    model       all of these as the trainer's `Model`

The commands, and what they need besides:

    embed       `g2rpo embed`: the embeddings of a run's prompts, stored ahead of it
    writer      filling a store, alone, in a way that survives being killed
    sample      `g2rpo sample`: images of a checkpoint, by diffusers' own pipeline
    pipeline    that pipeline, loaded
    snippet     which weights are meant, and the lines of Python that draw the same

    miniature   a pipeline of a few megabytes with random weights, for tests and trials

Nothing is imported from here: diffusers and transformers take seconds, which only those should pay
who use them.
"""
