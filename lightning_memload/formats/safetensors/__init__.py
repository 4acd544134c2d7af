"""Files of safetensors, and directories of them: what lies where, and how they are written."""
