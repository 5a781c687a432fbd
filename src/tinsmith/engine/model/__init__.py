"""The base model: transformers' own module tree, with attention, experts and linear layers replaced
through transformers' extension points."""
