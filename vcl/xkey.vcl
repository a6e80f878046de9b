# Purges by key beside those by ban: an addition to varnish7.vcl and varnish6.vcl, for a Varnish with vmod_xkey (Debian:
# varnish-modules). It stands behind their "import std;", so that its subroutines run before theirs of the same names;
# `clearcoat vcl --delivery xkey` puts it there.

import xkey;

sub vcl_recv {
    # What a client sends under this name is not ours.
    unset req.http.X-Clearcoat-Invalidated;
    if (req.method == "PURGE" && (req.http.xkey-purge || req.http.xkey-softpurge)) {
        call purge_keys;
    }
}

# Ends the request in every case. Unlike a ban, it costs nothing for the pages that it does not drop.
sub purge_keys {
    # As in take_purge: who holds the connection, and who a PROXY header says is behind it.
    if (remote.ip !~ purge || client.ip !~ purge) {
        return (synth(405, "Method not allowed"));
    }
    # One purge a request: what is answered "Purged" has all been carried out.
    if ((req.http.xkey-purge && req.http.xkey-softpurge) ||
        req.http.X-Magento-Tags-Pattern || req.http.X-Pool || req.http.X-Clearcoat-Flush) {
        return (synth(400, "xkey-purge or xkey-softpurge: one of them, and no other purge beside it"));
    }
    # Blanks between keys, and no commas: up to varnish-modules 0.15 (that of many a Varnish 6.0), blanks alone part them.
    std.collect(req.http.xkey-purge, " ");
    std.collect(req.http.xkey-softpurge, " ");
    set req.http.xkey-purge = regsuball(req.http.xkey-purge, ",", " ");
    set req.http.xkey-softpurge = regsuball(req.http.xkey-softpurge, ",", " ");
    if (req.http.xkey-purge ~ "[^\s,]") {
        set req.http.X-Clearcoat-Invalidated = xkey.purge(req.http.xkey-purge);
    } else if (req.http.xkey-softpurge ~ "[^\s,]") {
        # Pages stay for grace: the next reader gets the old one once more, and it is fetched anew behind him.
        set req.http.X-Clearcoat-Invalidated = xkey.softpurge(req.http.xkey-softpurge);
    } else {
        return (synth(400, "xkey-purge or xkey-softpurge: no key in it"));
    }
    return (synth(200, "Purged"));
}

# vmod_xkey indexes what is stored by this header. A page that came in before this part was loaded does not have it: no
# key would ever drop that page, so it is fetched anew.
sub vcl_hit {
    if (obj.http.X-Magento-Tags && !obj.http.xkey) {
        set req.hash_always_miss = true;
        return (restart);
    }
}

sub vcl_backend_response {
    unset beresp.http.xkey;
    if (beresp.http.X-Magento-Tags) {
        # Blanks, as above.
        set beresp.http.xkey = regsuball(beresp.http.X-Magento-Tags, ",", " ");
    }
}

sub vcl_deliver {
    unset resp.http.xkey;
}

sub vcl_synth {
    if (req.http.X-Clearcoat-Invalidated && resp.status == 200) {
        set resp.http.Content-Type = "application/json";
        synthetic({"{"invalidated":"} + req.http.X-Clearcoat-Invalidated + {"}"});
        return (deliver);
    }
}
