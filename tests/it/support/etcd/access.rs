//! Access control of an etcd.

use etcd_client::{Permission, PermissionType};

use super::Etcd;

/// A user's permission for keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    ReadWrite,
}

impl Etcd {
    /// Requires authentication. The harness continues as root, who may do everything.
    pub fn enable_auth(&mut self, root_password: &str) {
        self.call("enable authentication", async |mut client| {
            client.user_add("root", root_password, None).await?;
            client.user_grant_role("root", "root").await?;
            client.auth_enable().await
        });
        self.root = Some(root_password.to_owned());
        self.unsettle_all();
    }

    /// Disables authentication. Users stay.
    pub fn disable_auth(&mut self) {
        self.call("disable authentication", async |mut client| client.auth_disable().await);
        self.root = None;
        self.unsettle_all();
    }

    /// Adds a user with this permission for the keys of these prefixes, and nothing else. Before or after
    /// [`Etcd::enable_auth`].
    pub fn add_user(&self, name: &str, password: &str, prefixes: &[(&str, Access)]) {
        self.call(&format!("add the user {name}"), async |mut client| {
            client.user_add(name, password, None).await?;
            client.role_add(name).await?;
            for (prefix, access) in prefixes {
                let kind = match access {
                    Access::Read => PermissionType::Read,
                    Access::Write => PermissionType::Write,
                    Access::ReadWrite => PermissionType::Readwrite,
                };
                let permission = Permission::new(kind, *prefix);
                let all = if prefix.is_empty() { permission.with_all_keys() } else { permission.with_prefix() };
                client.role_grant_permission(name, all).await?;
            }
            client.user_grant_role(name, name).await
        });
    }

    /// Changes a user's password. Tokens obtained with the old one end.
    pub fn change_password(&mut self, name: &str, password: &str) {
        self.call(&format!("change the password of {name}"), async |mut client| {
            client.user_change_password(name, password).await
        });
        if name == "root" && self.root.is_some() {
            self.root = Some(password.to_owned());
            self.unsettle_all();
        }
    }
}
