// The number of the ABI, for the library and for its build script.

/// The version of the binary interface that this header declares; `bn_abi_version` tells that of the library. It grows when a
/// program that was compiled with an older header could no longer run, and for nothing else: new functions and new values of
/// enumerations leave it alone.
pub const BN_ABI_VERSION: u32 = 1;
