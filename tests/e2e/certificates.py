"""Certificates made by openssl: an authority, and what it signs."""

import pathlib
import subprocess


def openssl(*arguments, cwd=None):
    subprocess.run(["openssl", *map(str, arguments)], cwd=cwd, check=True, capture_output=True)


def role_name(role, cluster="e2e"):
    return f"{role}.{cluster}.bora.internal"


class Authority:
    """An authority of its own in a folder of its own."""

    def __init__(self, directory, name="authority"):
        self.directory = pathlib.Path(directory) / name
        self.directory.mkdir(parents=True)
        self.certificate, self.key = self.directory / "ca.crt", self.directory / "ca.key"
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", 30, "-subj", f"/CN={name}",
                "-keyout", self.key, "-out", self.certificate, "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
        (self.directory / "index.txt").write_text("")
        (self.directory / "serial").write_text("1000\n")
        (self.directory / "ca.cnf").write_text("\n".join([
            "[ca]", "default_ca = here", "[here]", f"database = {self.directory}/index.txt", f"serial = {self.directory}/serial",
            f"new_certs_dir = {self.directory}", "default_md = sha256", "policy = any", "unique_subject = no", "[any]", "commonName = supplied"]))

    def issue(self, name, names="DNS:localhost,IP:127.0.0.1", begins="20200101000000Z", ends="20991231235959Z", into=None):
        """(certificate file, key file), good for server and client, between two times."""
        into = pathlib.Path(into or self.directory)
        certificate, key, request = into / f"{name}.crt", into / f"{name}.key", into / f"{name}.csr"
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        extensions = into / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\nbasicConstraints=CA:FALSE\n")
        openssl("ca", "-batch", "-notext", "-config", self.directory / "ca.cnf", "-cert", self.certificate, "-keyfile", self.key, "-in", request, "-out", certificate,
                "-extfile", extensions, "-startdate", begins, "-enddate", ends)
        return certificate, key

    def expired(self, name, **more):
        return self.issue(name, begins="20200101000000Z", ends="20210101000000Z", **more)

    def grpc(self, name, role=None, cluster="e2e", authority=None, **more):
        """A `grpc.tls` section with a certificate of this authority that bears a role in a cluster, or other names."""
        if role:
            more["names"] = f"DNS:{role_name(role, cluster)}"
        certificate, key = self.issue(name, **more)
        return {"ca_file": str((authority or self).certificate), "certificate_file": str(certificate), "key_file": str(key)}
