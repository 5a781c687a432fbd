"""The data plane: owns the device and the weights. Knows no SQL, no HTTP and no tenants."""
