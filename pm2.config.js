// The service for PM2, the same on every host: `pm2 start pm2.config.js` in the repository to deploy, or from
// anywhere with ESTELLE_REPO=/path/to/it (PowerShell: `$env:ESTELLE_REPO = "C:\path"` first; cmd: `set "ESTELLE_REPO=C:\path"`).
// Keep this file beside estelle_updater.pyz, wherever that lies.
const fs = require('fs');
const path = require('path');

// What `setup` writes here about this host when it installs this file. By hand it stays null, and what is below holds.
const installed = null;
const windows = process.platform === 'win32';
const pyz = path.join(__dirname, 'estelle_updater.pyz');
const repo = path.resolve(process.env.ESTELLE_REPO || process.cwd());
// A project that has a name, where a host has several, has a service of that name.
const text = ['json', 'toml'].map((form) => path.join(repo, 'config', `updater.${form}`))
  .filter(fs.existsSync).map((file) => fs.readFileSync(file, 'utf8').split(/^\s*\[/m)[0])[0] || '';
const project = (/^\s*\{?\s*"?project"?\s*[:=]\s*"([a-z0-9][a-z0-9_-]{0,31})"/m.exec(text) || [])[1];

const app = {
  name: project ? `estelle-updater-${project}` : 'estelle-updater', // on every host; the role follows from masterUrl and the host's own address
  script: fs.existsSync(pyz) ? pyz : path.join(__dirname, 'estelle_updater.py'), // the second in a source checkout
  args: 'serve',
  interpreter: windows ? 'python' : 'python3', // Windows' python3 is often only a door to the Store
  cwd: repo, // config/updater.json is looked for from here upwards
  env: { PYTHONUTF8: '1' }, // else a Korean Windows writes its log in cp949, and PM2 shows garbage
  // A deployment changes files all the time, and PM2 must not take that for a reason to restart.
  watch: false,
  vizion: false, // nor needs PM2 to run git there at every start
  // The daemon takes its leave of its connections; PM2's 1.6 s would kill it meanwhile. A deployment that runs
  // is no child of it and goes on, the daemon's next life reports how it ended.
  kill_timeout: 10000,
  // 0.5 s, then half as much again up to 15 s: a host whose network or configuration is not ready yet comes up
  // by itself, while without this PM2 gives up after 16 quick failures.
  exp_backoff_restart_delay: 500,
  ...installed,
};
// A script whose path has a space PM2 takes for a line of bash, but an argument may have one.
if (!windows && app.script.includes(' ')) {
  app.args = [app.script].concat(app.args);
  app.script = app.interpreter;
  app.interpreter = 'none';
}
module.exports = { apps: [app] };
