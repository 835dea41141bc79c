"""Building blocks on tensors: towers, losses, fusion, masking, multi-task rules, policies."""
