"""The only part of the adapter that knows transformers."""

# Before any module of this package: who waits for it (mpo_tn.torch) imports several of them.
import transformers as transformers
