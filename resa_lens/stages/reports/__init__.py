"""What a person reads of a result: tables and sentences, the same wherever they are shown."""
