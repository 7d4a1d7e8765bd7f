"""What a run is: the schema, its loading and validation, and the YAML files people start from."""

import logging
import os

# Jobs import this room first. transformers imports torchao where it finds it, whose build for CUDA
# warns on machines without.
for chatty in ("torchao", "torch.utils._pytree"):
    logging.getLogger(chatty).setLevel(logging.ERROR)

# torch's store prints a C++ stack where it warns, also of what is said in words a moment later.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
