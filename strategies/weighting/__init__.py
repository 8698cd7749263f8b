"""Rules for clients whose data differ in quality or relevance."""
