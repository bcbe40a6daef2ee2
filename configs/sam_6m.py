block = "sam"
