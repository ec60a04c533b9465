"""Training of translators, on the transformers Trainer (and so on Accelerate), and of the small frozen parts that we ship."""

from devil_hf.extras import needs

needs("accelerate", "train")
needs("datasets", "train")
