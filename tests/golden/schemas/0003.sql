BEGIN TRANSACTION;
CREATE TABLE actions (
	id INTEGER NOT NULL, 
	time FLOAT NOT NULL, 
	who VARCHAR(63) NOT NULL, 
	role VARCHAR(16) NOT NULL, 
	action VARCHAR(40) NOT NULL, 
	target VARCHAR(96) NOT NULL, 
	outcome VARCHAR(16) NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "actions" VALUES(1,1700000000.0,'ada','operator','start','golden-0001','done');
CREATE TABLE adapters (
	run VARCHAR(96) NOT NULL, 
	round INTEGER NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	bytes BIGINT NOT NULL, 
	content BLOB, 
	PRIMARY KEY (run, round), 
	FOREIGN KEY(run) REFERENCES runs (run)
);
CREATE TABLE admins (
	name VARCHAR(63) NOT NULL, 
	role VARCHAR(16) NOT NULL, 
	certificate VARCHAR(64) NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	since FLOAT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "admins" VALUES('ada','operator','abababababababababababababababababababababababababababababababab','active',1700000000.0);
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0003');
CREATE TABLE checkpoints (
	run VARCHAR(96) NOT NULL, 
	round INTEGER NOT NULL, 
	content BLOB NOT NULL, 
	PRIMARY KEY (run), 
	FOREIGN KEY(run) REFERENCES runs (run)
);
CREATE TABLE cursors (
	reader VARCHAR(63) NOT NULL, 
	event BIGINT NOT NULL, 
	PRIMARY KEY (reader)
);
INSERT INTO "cursors" VALUES('alerts',1);
CREATE TABLE decisions (
	run VARCHAR(96) NOT NULL, 
	site VARCHAR(63) NOT NULL, 
	verdict VARCHAR(16) NOT NULL, 
	reason TEXT NOT NULL, 
	decided_at FLOAT NOT NULL, 
	body TEXT NOT NULL, 
	PRIMARY KEY (run, site), 
	FOREIGN KEY(run) REFERENCES runs (run)
);
INSERT INTO "decisions" VALUES('golden-0001','alpha','approved','ok',1700000000.0,'{}');
CREATE TABLE enrolments (
	id VARCHAR(32) NOT NULL, 
	site VARCHAR(63) NOT NULL, 
	request TEXT NOT NULL, 
	signing_key VARCHAR(44) NOT NULL, 
	node_key TEXT NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	reason TEXT NOT NULL, 
	requested_at FLOAT NOT NULL, 
	decided_at FLOAT, 
	PRIMARY KEY (id)
);
CREATE TABLE "events" (
	id INTEGER NOT NULL, 
	run VARCHAR(96), 
	time FLOAT NOT NULL, 
	event VARCHAR(40) NOT NULL, 
	fields TEXT NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(run) REFERENCES runs (run)
);
INSERT INTO "events" VALUES(1,'golden-0001',1700000000.0,'round_started','{"round":1,"cohort":["alpha"]}');
CREATE TABLE invites (
	digest VARCHAR(64) NOT NULL, 
	site VARCHAR(63) NOT NULL, 
	expires BIGINT NOT NULL, 
	rotates INTEGER NOT NULL, 
	used_at FLOAT, 
	PRIMARY KEY (digest)
);
CREATE TABLE members (
	site VARCHAR(63) NOT NULL, 
	signing_key VARCHAR(44) NOT NULL, 
	node_key TEXT NOT NULL, 
	certificate TEXT NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	since FLOAT NOT NULL, 
	PRIMARY KEY (site)
);
CREATE TABLE rosters (
	version INTEGER NOT NULL, 
	roster TEXT NOT NULL, 
	signature VARCHAR(88) NOT NULL, 
	PRIMARY KEY (version)
);
CREATE TABLE runs (
	run VARCHAR(96) NOT NULL, 
	"plan" TEXT NOT NULL, 
	plan_sha256 VARCHAR(64) NOT NULL, 
	plan_name VARCHAR(63) NOT NULL, 
	rounds INTEGER NOT NULL, 
	quorum INTEGER NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	round INTEGER NOT NULL, 
	link_run VARCHAR(20), 
	code VARCHAR(6), 
	detail TEXT, 
	proposed_at FLOAT NOT NULL, 
	started_at FLOAT, 
	finished_at FLOAT, 
	PRIMARY KEY (run)
);
INSERT INTO "runs" VALUES('golden-0001','{"plan":"{\"aggregation\":{\"bound\":null,\"byzantine\":null,\"cohort\":7,\"encoding\":\"uint32\",\"head\":\"shared\",\"secure\":true,\"selected\":null,\"strategy\":\"fedavg\",\"threshold\":6,\"trim\":null,\"update_bound\":null,\"weights\":\"declared\"},\"data\":{\"dataset\":\"notes\",\"max_length\":128,\"split_by\":\"unit\",\"test_share\":0.2,\"validation_share\":0.1},\"lora\":{\"alpha\":16.0,\"dropout\":0.0,\"last_layers\":null,\"r\":8,\"target_modules\":\"auto\"},\"model\":{\"base\":\"x\",\"centre_texts\":[],\"dtype\":\"auto\",\"feature_scale\":4.0,\"labels\":[\"a\",\"b\"],\"pooling\":\"mean\",\"sha256\":null,\"task\":\"text_classification\"},\"optimizer\":{\"server\":{\"beta2\":0.999,\"epsilon\":1e-08,\"lr\":1.0,\"momentum\":0.9,\"name\":\"adam\"},\"site\":{\"adapter_lr\":0.001,\"final_share\":0.2,\"head_lr\":0.05,\"head_rounds\":0,\"local\":\"adam\",\"prox\":0.0,\"schedule\":\"linear\",\"warmup_share\":0.1}},\"plan\":{\"name\":\"golden\",\"purpose\":\"test\",\"seed\":7},\"privacy\":{\"batch\":null,\"clip\":{\"adapter\":2.0,\"head\":0.5,\"head_share\":0.5},\"delta\":1e-05,\"epsilon\":8.0,\"max_physical_batch\":128,\"max_records_per_unit\":4,\"metrics_share\":0.0,\"mode\":\"record\",\"noise\":\"shared\",\"rate\":0.05,\"site\":null,\"unit\":\"patient\"},\"rounds\":{\"deadline\":3600.0,\"evaluate_every\":0,\"local_steps\":1,\"min_sites\":3,\"number\":3}}","signature":"EtcQyyqZc9PJU6kY01gvqsreCil5AIkOWa2H6RuKBHA9I56K/RabvPE0/bkXGvm8SMpCj4pOMtmvhkhI64U0Bw==","key":"A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg="}','db62ab684347ae82a8097006d4a48ca7d1c856511bbbcbe8497b7f9c1127a50b','golden',3,2,'running',1,'7',NULL,NULL,1700000000.0,NULL,NULL);
CREATE INDEX events_by_run ON events (run, id);
COMMIT;
