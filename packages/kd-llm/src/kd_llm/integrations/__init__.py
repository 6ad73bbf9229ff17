"""The transformers side: a Trainer that distils, and the stage that runs it."""
