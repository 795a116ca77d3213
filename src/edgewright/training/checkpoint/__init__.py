"""The checkpoint engine: folders of safetensors files and a manifest, each of them complete or absent. No pickle.

`files` the operations on a folder or fsspec URL, `shards` data files through torch.distributed.checkpoint, `tree` the
state that is no tensor, `records` rows of tables at few bits, `manifest` what a checkpoint consists of, `capture` a
copy of a live state, `writer` quantises, writes and commits, `chain` finds, checks, replays and deletes checkpoints.
"""
