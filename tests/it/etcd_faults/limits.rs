//! What etcd does not let us do: without a password, and without space.
