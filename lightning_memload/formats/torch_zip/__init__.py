"""Files of ``torch.save``, and directories of them: what lies where, and how they are written."""
