"""What a patient is on paper: the ontology, notes, simulated patients and faces, phenopacket files."""
